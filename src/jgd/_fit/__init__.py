"""Training by one method on many examples: a schedule, compiled epochs, and a loop that can be watched."""
