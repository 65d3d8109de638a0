"""The parts that fusion needs, on torch alone; numbers and foreign layers come in from outside."""
