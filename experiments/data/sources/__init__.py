"""Where texts and labels come from: files, folders and the hub, row by row."""
