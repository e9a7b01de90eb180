"""What the makers of the course run: figures, exercises, studies, records, runs and the
book.
"""
