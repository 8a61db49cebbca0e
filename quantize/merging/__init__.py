"""What the runs of ``--part`` made, put together: in a folder, or in one commit on the Hub."""
