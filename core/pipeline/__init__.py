"""The steps of a job: inputs from the store, outputs to the store, no SQL; and the same steps run in one process."""
