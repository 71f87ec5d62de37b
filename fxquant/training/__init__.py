"""What drives a training: its stages, BatchNorm statistics taken anew, and a teacher."""
