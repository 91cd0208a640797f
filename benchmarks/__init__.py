"""What moelora costs, beside what else there is: each file is a script that says how it is run."""
