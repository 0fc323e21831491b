"""What a run stands on: its disk, processes, devices, signals and clock."""
