"""The sources that scenarios run on, one module a broker; ``tests.faults.registry`` knows all.

Nothing is imported here: a worker process loads the client library of its own broker only.
"""
