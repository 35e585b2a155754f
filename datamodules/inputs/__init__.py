"""What `data pack` can read: one module per kind of source, all of them as numbered inputs."""
