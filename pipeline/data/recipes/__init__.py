"""What is known about public data sets: layout, labels, patients, licence, published counts; one file a family."""
