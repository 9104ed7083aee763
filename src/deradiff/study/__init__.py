"""A preference study: two grids of images side by side, three questions, and the votes analysed (AIG, §4.4 and A.4).

A plan says which methods of which experiments are compared, a server shows the pairs and keeps the votes, an analysis
counts them.
"""
