"""HTTP: routes, problem details, authentication, event streams and the dashboard's pages. Never loads torch."""
