"""All that only a GPU can show, part by part; see __main__.py."""
