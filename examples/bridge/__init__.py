"""Orders from RabbitMQ into a stream of NATS."""
