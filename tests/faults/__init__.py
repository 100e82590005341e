"""Real kills, cuts and floods against real processes, and a checker that counts what they cost."""
