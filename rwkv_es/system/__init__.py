"""What the operating system is asked for: files that survive a crash, locks, texts, streams."""
