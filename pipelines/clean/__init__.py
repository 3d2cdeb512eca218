"""Cleaning: data-juicer's operators over whole Arrow columns, near-duplicates and top-k over the whole data set."""
