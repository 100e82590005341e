"""A year of flights through a broker: validated, enriched, counted, shown."""
