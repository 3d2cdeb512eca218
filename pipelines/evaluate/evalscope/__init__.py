"""evalscope, run in processes of its own: what it is asked, and what it says."""
