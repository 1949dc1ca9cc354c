"""Entry points, one file a job: parse, call, print."""
