"""The `bitmill` command: a REST client, the pipeline without the service, and the embedded stack (`up`, `demo`).

Importing this package imports nothing; only `cli.local` reaches the numeric wing, and only when a command needs it.
"""
