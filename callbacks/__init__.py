"""What happens around training: averages, pictures, metrics, speed, safety, progress; one concern per file."""
