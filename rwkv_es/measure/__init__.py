"""Numbers for people: metrics, statistics, summaries."""
