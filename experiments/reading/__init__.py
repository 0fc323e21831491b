"""From what was typed to a config that a run can finish: flags, fields, plugins."""
