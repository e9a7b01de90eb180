"""The quick paths, each tested against the plain one: convolutions of many networks, a
whole HyperLSTM, memory.
"""
