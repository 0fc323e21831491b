"""The benchmark on real pretrained models: arms, tasks, costs, outcomes and page."""
