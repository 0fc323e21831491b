"""Whole train steps and decoding on one GPU, beside PEFT on torch.compile."""
