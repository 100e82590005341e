"""A year of flights through a JetStream stream: validated, enriched, counted, shown."""
