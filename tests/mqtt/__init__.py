"""MQTT on Mosquitto."""
