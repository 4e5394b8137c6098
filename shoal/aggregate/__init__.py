"""What becomes of updates: exact sums, the mean, the server's step."""
