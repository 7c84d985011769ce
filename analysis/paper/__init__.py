"""`optbench paper`: a published table, cell by cell beside what is predicted and what was measured."""
