"""What stages leave and find: the workspace, work over shards, rows, files, manifests and reports."""
