"""What an interrupted run leaves and the next one takes over: the journal, its seals, and how two runs differ."""
