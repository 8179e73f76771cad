"""Where correlations come from: what a pass needs of a source (`base`), and a file, or a room, for each source."""
