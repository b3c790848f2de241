"""Training by one method on many examples: the schedule, the compiled epochs, and the loop that can be watched."""
