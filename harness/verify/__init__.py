"""Certificates: does an optimizer on an engine compute what its rule computes on whole matrices?"""
