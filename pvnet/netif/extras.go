package netif

// Extras are the extra infos of one frame: at most one of each type, as Linux keeps them.
// The zero Extras is empty. It is a value: nothing in it points to a ring.
//
// The receiving end fills it with [Extras.Add] and asks for a body with [Extras.Of]; the
// sending end fills it likewise and writes [Extras.At] 0 to [Extras.Len]-1 to its ring.
type Extras struct {
	n    int
	list [len(extraTypes)]Extra // by type; ExtraNone: none of that type
}

// Add puts x in the list, in place of one of the same type. It returns the error of
// [Extra.Check], and then leaves the list as it is.
func (l *Extras) Add(x Extra) error {
	if err := x.Check(); err != nil {
		return err
	}
	if !l.Has(x.Type) {
		l.n++
	}
	l.list[x.Type] = x
	return nil
}

// Len returns how many extra infos the list holds, which is how many slots they take.
func (l *Extras) Len() int { return l.n }

// Has reports whether the list holds an extra info of type t.
func (l *Extras) Has(t ExtraType) bool { return l.Of(t).Type != ExtraNone }

// Of returns the extra info of type t. It is the zero Extra if there is none, whose bodies
// are zero, too.
func (l *Extras) Of(t ExtraType) Extra {
	if int(t) < len(l.list) {
		return l.list[t]
	}
	return Extra{}
}

// At returns the extra info that takes slot i of [Extras.Len], as a ring holds it: all but
// the last say that another follows. They are in the order of their types.
func (l *Extras) At(i int) Extra {
	more := i < l.n-1
	for _, x := range l.list {
		if x.Type == ExtraNone {
			continue
		}
		if i == 0 {
			return x.WithMore(more)
		}
		i--
	}
	panic("netif: no such extra info")
}
