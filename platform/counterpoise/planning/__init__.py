"""`counterpoise plan`: what a run or a sweep would take on a cluster, from counted steps, data sheets and measurements.

workload   what one step, one epoch and one checkpoint consist of, counted from the real network and loop
facts      every number that is not counted, with its origin; hardware.yaml has those of data sheets
model      the arithmetic: step, epoch, run, failures, cost, and what breaks first
calibrate  numbers measured on this machine
text       the plan in words and pictures
"""
