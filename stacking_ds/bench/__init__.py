"""Speed, memory and traffic claims as commands that a user can run on their own machine."""
