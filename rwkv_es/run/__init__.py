"""What a run is on disk and across processes."""
