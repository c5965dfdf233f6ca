package pvnet

import (
	"cmp"
	"slices"

	"barevif/hypercall"
)

// mapped returns the runs of the queue, those that are left included.
func (q *grantQueue) mapped() []*pageRun { return slices.Concat(q.table.all(), q.left) }

// makeRoom makes room for the mappings of an addition, two at most, so that a frontend may add
// and remove its pages one by one for as long as it likes. When the mappings of a queue run
// out, or those of all vifs, it maps the pages of the smallest ones again, together. They stay mapped meanwhile,
// so one mapping more is needed for a moment. It cannot make room while the engines do not
// answer, or while the pages of most mappings are lent: the addition is then refused.
func (s *grantServer) makeRoom(q *grantQueue) {
	const need = 3 // a mapping of each access, and the one of the pages of others together
	fits := func() bool {
		n := len(q.mapped()) + need
		return n <= ownRuns || n <= maxRuns && s.all.Load()+need <= mostRuns
	}
	if !fits() && len(q.left) > 0 {
		q.awaitUse()
	}
	for !fits() {
		before := len(q.mapped())
		if err := s.merge(q); err != nil {
			s.log.Warn("static grants cannot be mapped together", "mappings", before, "err", err)
		}
		if len(q.mapped()) >= before {
			return
		}
	}
}

// merge maps the pages of the smaller half of the runs of one access in one run.
func (s *grantServer) merge(q *grantQueue) error {
	var by [2][]*pageRun
	for _, r := range q.table.all() {
		by[r.access] = append(by[r.access], r)
	}
	access := hypercall.ReadOnly
	if len(by[hypercall.ReadWrite]) > len(by[hypercall.ReadOnly]) {
		access = hypercall.ReadWrite
	}
	runs := by[access]
	slices.SortStableFunc(runs, func(a, b *pageRun) int { return cmp.Compare(len(a.refs), len(b.refs)) })
	small := runs[:(len(runs)+1)/2]
	if len(small) < 2 || pagesOf(q.mapped())+pagesOf(small) > maxMapped {
		return nil // the mappings are those of lent pages
	}
	var refs []hypercall.GrantRef
	for _, r := range small {
		refs = append(refs, r.refs...)
	}
	slices.Sort(refs) // pages that were granted together often need one entry of a page table
	one, err := s.mapIf(q, len(q.table.all()), refs, access, func(all int64) bool {
		return len(q.left) == 0 || all < mostRuns // one mapping more, until the others are left
	})
	if err != nil {
		return err
	}
	rest := slices.DeleteFunc(slices.Clone(q.table.runs), func(r *pageRun) bool { return slices.Contains(small, r) })
	q.left = append(q.left, small...)
	q.use(newGrantTable(append(rest, one), q.seed))
	q.awaitUse()
	return nil
}
