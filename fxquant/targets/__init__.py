"""What each deployment runtime runs as integers, how it is run here, and how a file for it is checked."""
