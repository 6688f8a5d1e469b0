"""What is measured, as programs: each runs by its path in this project's environment or in the peers', and so imports
nothing of `benchmarks`.
"""
