"""Tables and figures of the chapters, drawn from recorded runs and from nothing else; a
module a system.
"""
