"""What each stage reports, as the classes that its manifest is written from and read into."""
