"""Whole train steps and decoding on one GPU, compared with PEFT on torch.compile."""
