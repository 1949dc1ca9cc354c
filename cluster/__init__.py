"""All that is Ray: actors, the scheduler that plans and shards, the result store."""
