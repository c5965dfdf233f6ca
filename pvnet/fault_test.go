package pvnet

import (
	"errors"
	"testing"
)

// A panic that is no fault of memory is a mistake of the program, and stays one.
func TestOtherPanicsAreNoFaults(t *testing.T) {
	mistake := errors.New("a mistake")
	defer func() {
		if r := recover(); r != mistake {
			t.Errorf("the panic became %v", r)
		}
	}()
	v := catchFault(func() { panic(mistake) })
	t.Errorf("the panic became the violation %v", v)
}

func TestAFaultIsAViolation(t *testing.T) {
	if v := catchFault(func() { panic(goneFault{}) }); v == nil || v.Reason != "shared memory is gone at 0x1" {
		t.Errorf("%v", v)
	}
	if v := catchFault(func() {}); v != nil {
		t.Errorf("%v without a fault", v)
	}
}
