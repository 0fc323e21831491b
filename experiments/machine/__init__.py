"""The machine that a run uses: disk, processes, devices, signals and clock."""
