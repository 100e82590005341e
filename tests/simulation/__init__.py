"""The engine under a scheduler that is chosen by a seed: its own event loop, its own time.

``python -m tests.simulation --seeds 10000`` explores; a seed that fails goes into ``seeds.txt``.
"""
