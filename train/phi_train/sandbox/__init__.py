"""Run programs that a model wrote, so that they harm nothing and cannot pass by other means than right answers.

`Sandbox` (run.py) is what callers use. A worker process (worker.py) forks two confined children for each program
(confine.py): one runs the program, the other its tests. The tests reach the program's function by values over a pipe
(values.py), so what the program writes, prints or ends with never decides.
"""
