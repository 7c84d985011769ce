"""What is measured beside training: progress, validation loss, spectra of the moments, memory, FLOPs."""
