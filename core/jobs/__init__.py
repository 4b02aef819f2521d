"""The queue's domain: jobs, steps, attempts, leases and everything that is remembered in SQL. Never imports torch."""
