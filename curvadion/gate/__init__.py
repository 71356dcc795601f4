"""When replicas synchronize: what the gate looks at, when it asks, and what happens when something is
wrong."""
